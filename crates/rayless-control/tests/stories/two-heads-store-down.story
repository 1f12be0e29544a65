# The store is gone: the head goes on while its lease surely holds, then decides nothing more. What runs goes on; a launch waits and
# is served when the store is back, under a new term.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
launch g from c: 8 x {GPU:1}
within 3s expect group g running
store down
for 1s expect head a 1
within 3s expect head none
for 60s expect g placed
launch w from c: 16 x {GPU:1}
expect talk c "does not answer"
expect w asking
store up
within 6s expect w placed
within 1s expect group g running
stop g
stop w
within 2s expect all free
