# The store is away for less than the lease: nobody notices.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
store down
for 1s expect head a 1
store up
for 20s expect head a 1
expect not said "no longer the head"
