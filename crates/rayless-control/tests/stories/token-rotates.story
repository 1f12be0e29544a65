# A new token is spread under a running engine. Who knows only the old one may come in and gets the new one, until the operator ends
# that; after it such a node is refused, and the others notice nothing.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU, off
node d: 8 GPU, off
wait 1s
launch g from b: 16 x {GPU:1}
within 2s expect group g running
expect rotation over
rotate
within 1s expect rotation spread
expect tokens a: 2,1
expect tokens b: 2,1
expect said "[token-spread]"
start c
within 1s expect node c alive
within 1s expect tokens c: 2,1
expect rotation spread
finish rotation
within 1s expect tokens b: 2
expect tokens c: 2
expect rotation over
expect said "[token-rotated]"
start d
within 1s expect refused d "another cluster token"
expect refusals 1
for 10s expect node b alive
expect group g running
stop g
within 5s expect all free
