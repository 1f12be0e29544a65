# A node was cut off during two takeovers. The first head that it knew is the head again, under a third term: it is welcome there, and
# under a term lower than the last it had seen it would not be.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
cut a c
cut b c
wait 5s
restart daemon c
kill daemon a
within 5s expect head b 2
start a
within 2s expect standby a
kill daemon b
within 5s expect head a 3
wait 3s
heal a c
heal b c
within 5s expect follows c a
within 1s expect node c alive
