# Somebody replaced the store by an empty one. Terms still only go up, since the nodes and the heads remember the last.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
kill daemon a
within 5s expect head b 2
start a
within 2s expect follows a b
store forgets
wait 1s
within 5s expect node c alive
for 5s expect node c alive
expect not said "is used twice"
