# The daemon is restarted before anybody could call it dead.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from b: 16 x {GPU:1}
within 2s expect group g running
restart daemon b
within 1s expect said "node b joined again as a new life"
expect group g running
expect not said "[node-dead]"
expect free b: 0 GPU
stop g
within 1s expect group g stopped
expect all free
