# A reservation is given back while node b has no session. When b is back and still brings its bundle, it is told to drop it; so it is
# by a head that was restarted meanwhile.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
reserve pg from a: 2 x {GPU:4} STRICT_SPREAD
within 1s expect pg on a b
reserve qg from a: 3 x {GPU:1} STRICT_SPREAD
within 1s expect qg on a c b
cut udp a b
break b
cut udp a c
break c
remove pg
remove qg
wait 500ms
expect placement groups: 0
heal a b
within 2s expect node b alive
expect placement groups: 0
expect free b: 8 GPU
restart daemon a
heal a c
within 3s expect node c alive
expect placement groups: 0
expect free c: 8 GPU
