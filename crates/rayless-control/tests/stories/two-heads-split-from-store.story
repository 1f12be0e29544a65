# The head's half loses the store, too. Its nodes wait for a head; the other half goes on under the standby. When all is whole again
# everybody is with the new head, and nothing was started twice.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
launch g from c: 8 x {GPU:1}
launch h from d: 8 x {GPU:1}
within 3s expect group g running
within 3s expect group h running
store cut a
cut a b
cut a d
cut c b
cut c d
within 5s expect head b 2
within 3s expect node d alive
for 30s expect h placed
expect g placed
expect talk c "does not answer"
store heal a
heal a b
heal a d
heal c b
heal c d
within 3s expect follows c b
within 3s expect follows a b
within 2s expect group g running
expect group h running
stop g
stop h
within 2s expect all free
