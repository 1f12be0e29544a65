# Head and nodes are started again in the middle of a rotation: what each has on disk is enough.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch g from b: 16 x {GPU:1}
within 2s expect group g running
kill daemon c
rotate
within 1s expect tokens b: 2,1
kill daemon a
lose head state
wait 2s
kill daemon b
start b
start a
within 3s expect node b alive
expect rotation spread
start c
within 3s expect node c alive
within 1s expect tokens c: 2,1
finish rotation
within 1s expect tokens c: 2
restart daemon a
within 3s expect node c alive
within 3s expect rotation over
expect group g running
