# The driver was told just before the head died, and its sessions are slow to come: the next head leaves the group to it.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
delay c d 2000ms
launch g from c: 16 x {GPU:1}
within 1s expect g placed
kill daemon a
within 5s expect head b 2
within 9s expect group g running
stop g
within 7s expect all free
