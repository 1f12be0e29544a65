# a dies, b takes over; b dies before it is well in office, a is back and takes over again: three terms, one group.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
launch g from c: 16 x {GPU:1}
within 3s expect group g running
kill daemon a
within 5s expect head b 2
kill daemon b
start a
within 6s expect head a 3
within 2s expect node c alive
within 2s expect node d alive
within 2s expect group g running
start b
within 2s expect follows b a
within 2s expect standby b
for 10s expect g placed
stop g
within 2s expect all free
