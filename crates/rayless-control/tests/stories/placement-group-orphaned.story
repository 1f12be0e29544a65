# The daemon of the client that reserved restarts. What runs in the reservation goes on; it ends with the last of it, since nobody
# is left who could give it back.
node a: 8 GPU
node b: 8 GPU
wait 1s
reserve pg from b: 2 x {GPU:4} STRICT_SPREAD
reserve unused from b: 1 x {GPU:1}
within 1s expect pg on b a
launch g from b: 8 x {GPU:1} in pg
within 2s expect group g running
expect placement groups: 2
restart daemon b
within 1s expect life b 2
wait 1s
expect placement groups: 1
expect group g running
stop g
within 1s expect placement groups: 0
within 1s expect all free
