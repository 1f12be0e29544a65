# The head loses its state, and the daemon that held the bundles was restarted: nobody remembers the reservation. What runs in it is
# adopted all the same, and its GPUs are given to nobody else.
node a: 8 CPU
node b: 8 GPU
wait 1s
reserve pg from b: 2 x {GPU:4}
within 1s expect pg on b b
launch g from b: 6 x {GPU:1} in pg
within 2s expect group g running
kill daemon a
lose head state
restart daemon b
start a
within 3s expect node b alive
within 1s expect group g running
expect free b: 2 GPU
launch h from b: 3 x {GPU:1}
within 1s expect h waiting "2 of 8 are free"
stop g
within 1s expect h placed
