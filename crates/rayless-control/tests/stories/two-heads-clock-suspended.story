# As above, but the store answers as soon as the machine goes on: the lease is over, whatever the clock says.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
freeze a
within 5s expect head b 2
wait 120s
resume a
within 3s expect follows a b
expect said "a: no longer the head (term 1)"
for 5s expect head b 2
