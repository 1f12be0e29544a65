# The wire breaks between the two halves of the cluster; the store is seen by both. The head keeps its half, the standby is a node like
# the others there: dead to the head, and back with all it holds when the wire is.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
launch g from d: 16 x {GPU:1}
within 3s expect group g running
cut a b
cut a d
cut c b
cut c d
within 4s expect node d dead
for 20s expect head a 1
heal a b
heal a d
heal c b
heal c d
within 5s expect node d alive
within 5s expect node b alive
for 5s expect head a 1
stop g
within 10s expect all free
