# The driver's node holds no rank, and asks the next head before the node that does has found it: the launch is taken out of the queue again when its
# part comes.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 0 GPU
node d: 8 GPU
within 2s expect node d alive
delay a d 300ms
launch g from c: 8 x {GPU:1}
wait 350ms
expect keepers d: 1
cut b d
kill daemon a
within 5s expect head b 2
within 2s expect g waiting
wait 1s
heal b d
within 4s expect g placed d:0-7
expect keepers d: 1
within 2s expect group g running
stop g
within 2s expect all free
