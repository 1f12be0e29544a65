# A node that is cut off for all of a rotation keeps its engine and its daemon, and says why the head does not take it. The one that was
# away for a part of it only catches up.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch g from b: 8 x {GPU:1}
within 2s expect group g running
cut a b
cut a c
within 5s expect node b dead
within 5s expect node c dead
rotate
heal a c
within 3s expect node c alive
within 1s expect tokens c: 2,1
finish rotation
heal a b
within 12s expect talk b "another cluster token"
for 5s expect g placed
expect tokens b: 1
expect node b dead
# The operator gives it the new token and starts its daemon again.
