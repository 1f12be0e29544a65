# A reservation survives a head without its state, and the restart of a daemon; it ends when one of its nodes leaves.
node a: 8 GPU
node b: 8 GPU
wait 1s
reserve pg from a: 2 x {GPU:4} STRICT_SPREAD
within 1s expect pg on a b
launch g from b: 2 x {GPU:2} in pg
within 1s expect g placed b:0-1
restart daemon b
within 1s expect life b 2
wait 1s
expect placement groups: 1
expect group g running
expect free b: 4 GPU
leave b
within 1s expect node b left
within 1s expect placement groups: 0
within 1s expect all free
reserve alone from a: 1 x {GPU:2}
within 1s expect alone on a
remove alone
within 1s expect all free
