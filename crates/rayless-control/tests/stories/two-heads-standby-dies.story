# The standby dies, and comes back: nothing changes for anybody, and then it is one again.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect standby b
launch g from c: 8 x {GPU:1}
within 3s expect group g running
power off b
within 5s expect standby b gone
for 10s expect head a 1
power on b
within 2s expect standby b
power off a
within 5s expect head b 2
within 1s expect node c alive
for 10s expect g placed
stop g
within 2s expect all free
