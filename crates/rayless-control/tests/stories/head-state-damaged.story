# A torn state file is noticed and put aside; the cluster has a new id and goes on.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from b: 8 x {GPU:1}
within 2s expect group g running
kill daemon a
damage head state
start a
within 2s expect node b alive
expect group g running
expect not said "[head-restarted]"
