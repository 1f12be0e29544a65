# Only the head does not reach the store: it steps down by itself before the standby can have the lease.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
launch g from c: 16 x {GPU:1}
within 3s expect group g running
store cut a
within 3s expect head none
within 3s expect head b 2
within 2s expect follows c b
within 2s expect group g running
store heal a
within 3s expect follows a b
within 2s expect standby a
for 20s expect g placed
stop g
within 2s expect all free
