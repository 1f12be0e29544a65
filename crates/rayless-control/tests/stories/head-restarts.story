# The head is killed under a running engine and comes back with its state file: same cluster, same group, nothing started twice,
# and a launch that waited meanwhile goes on.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
expect same cluster
launch g from b: 16 x {GPU:1}
within 2s expect group g running
launch w from c: 16 x {GPU:1}
within 1s expect w waiting
kill daemon a
wait 20s
expect g placed
start a
within 2s expect node b alive
within 2s expect node c alive
expect same cluster
expect group g running
expect w asking
stop g
within 1s expect w placed
