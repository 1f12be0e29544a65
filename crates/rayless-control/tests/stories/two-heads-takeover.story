# The head's host dies under a running engine: the standby has the lease within five seconds, every node is with it, the group runs on.
store lease 3s
node a: 0 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect head a 1
within 2s expect standby b
within 2s expect node d alive
launch g from c: 16 x {GPU:1}
within 3s expect group g running
kill daemon a
within 5s expect head b 2
within 1s expect node c alive
within 1s expect node d alive
within 1s expect group g running
for 20s expect g placed
expect keepers c: 1
stop g
within 2s expect all free
