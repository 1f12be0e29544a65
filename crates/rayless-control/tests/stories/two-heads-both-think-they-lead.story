# The machine of the old head was moved, and its clock stood still with it: it takes its lease for good and does not know that another
# is the head. Its term gives it away: no node does what it says, and the first that calls tells it.
store lease 3s
node a: 8 GPU, head
node b: 8 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
launch g from c: 8 x {GPU:1}
within 3s expect group g running
store cut a
freeze a
within 5s expect head b 2
within 2s expect follows c b
wait 30s
resume a
# a takes itself for the head for as long as its clock lets it.
expect believes a
expect head b 2
break c
within 2s expect follows c b
for 10s expect g placed
store heal a
within 5s expect follows a b
for 10s expect head b 2
expect g placed
stop g
within 2s expect all free
