# Node b's daemon is killed and started again a minute later. The engine runs on all the time; the new life of the daemon
# brings its keeper along, and nothing is started twice. The group of which b holds all is taken for failed until then.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 12 x {GPU:1}
within 2s expect group g running
launch own from b: 2 x {GPU:1}
within 2s expect group own running
expect gpus own rank 0: 4
kill daemon b
within 3.6s expect node b dead
wait 56s
expect g placed a:0-7 b:8-11
expect own placed b:0-1
expect group g running
expect group own failed "node b is dead"
start b
within 1s expect node b alive
expect life b 2
expect group g running
within 1s expect group own running
expect free b: 2 GPU
stop g
stop own
within 1s expect all free
