# Bundles are reserved first, groups are carved out of them, and the reservation ends with all that was carved.
node a: 8 GPU
node b: 8 GPU
wait 1s
reserve pg from a: 2 x {GPU:8} STRICT_SPREAD
within 1s expect pg on a b
expect placement groups: 1
expect gpu a 0 held
launch other from a: 1 x {GPU:1}
within 1s expect other waiting "0 of 16 are free"
launch g from a: 16 x {GPU:1} in pg
within 1s expect g placed a:0-7 b:8-15
launch h from a: 1 x {GPU:1} in pg
within 1s expect h waiting "other groups hold part of placement group pg"
launch i from a: 1 x {GPU:9} in pg wait 5s
within 1s expect i waiting "the bundles of placement group pg could never hold that"
stop g
within 1s expect h placed a:0
expect gpus h rank 0: 0
remove pg
within 1s expect answer remove pg "done"
within 1s expect i refused "there is no placement group"
within 1s expect group h stopped
within 1s expect other placed a:0
expect placement groups: 0
