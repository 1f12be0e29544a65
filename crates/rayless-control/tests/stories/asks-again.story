# The session of b breaks while its clients wait; one goes away before b is back. Nothing is started for it, and it
# does not stand in anybody's way. The one that still waits keeps its place.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch hold from a: 8 x {GPU:1}
within 1s expect hold placed a:0-7
launch gone from b: 16 x {GPU:1}
launch stays from b: 12 x {GPU:1}
within 1s expect gone waiting
within 1s expect stays waiting
cut udp a b
break b
cancel gone
wait 1s
heal a b
launch late from a: 12 x {GPU:1}
wait 10s
expect node b alive
expect stays waiting
stop hold
within 1s expect stays placed
expect late waiting
stop stays
within 1s expect late placed
