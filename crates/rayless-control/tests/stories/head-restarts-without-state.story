# The same without a state file: the nodes bring all that they hold, each at its own time.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from b: 12 x {GPU:1}
within 2s expect group g running
launch h from b: 2 x {GPU:0.5}
within 2s expect group h running
kill daemon a
lose head state
wait 20s
start a
within 2s expect node b alive
expect group g running
expect group h running
within 1s expect free a: 3 GPU
expect free b: 0 GPU
launch more from a: 4 x {GPU:1}
within 1s expect more waiting "needs 4 GPUs, 3 of 16 are free"
stop g
within 1s expect more placed
