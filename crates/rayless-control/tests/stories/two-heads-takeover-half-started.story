# The head dies when only one of two nodes has heard what to start. The launch can never be whole: after a few seconds the next head ends
# what there is of it and places it anew.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
delay a d 900ms
launch g from c: 16 x {GPU:1}
wait 800ms
expect keepers c: 1
expect keepers d: 0
kill daemon a
cut a d
within 5s expect head b 2
within 8s expect g placed c:0-7 d:8-15
within 2s expect group g running
stop g
within 2s expect all free
