# A standby is cut off from all but the store while the cluster's token is rotated. With the token it has nobody could join it: it does not take over,
# and says why. Given the present one, it stands by again.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
within 2s expect node c alive
within 2s expect standby b
launch g from c: 8 x {GPU:1}
within 2s expect group g running
cut a b
cut b c
within 5s expect node b dead
rotate
wait 1s
finish rotation
within 5s expect standby b gone
heal a b
heal b c
wait 2s
kill daemon a
for 10s expect head none
expect talk b "the cluster's token was rotated while it was away"
# The head comes back, and nobody else was.
start a
within 8s expect head a 2
give token a b
restart daemon b
within 3s expect standby b
within 2s expect group g running
kill daemon a
within 5s expect head b 3
within 2s expect group g running
