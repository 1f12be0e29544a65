# The head loses its state: the node that holds a bundle brings it back, with the group that was carved out of it.
node a: 8 GPU
node b: 8 GPU
wait 1s
reserve pg from b: 1 x {GPU:8}
within 1s expect pg on b
launch g from b: 3 x {GPU:1} in pg
within 1s expect group g running
kill daemon a
lose head state
start a
within 2s expect node b alive
expect placement groups: 1
expect group g running
expect free b: 0 GPU
launch h from b: 6 x {GPU:1} wait 1s
within 1s expect h placed a:0-5
stop g
within 1s expect free b: 0 GPU
remove pg
within 1s expect free b: 8 GPU
