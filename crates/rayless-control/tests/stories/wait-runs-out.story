# A wait ends: refused with the cause and how long it waited; nothing is left of it.
node a: 4 GPU
wait 1s
launch g from a: 8 x {GPU:1} wait 15s
wait 14s
expect g waiting
within 2s expect g refused "the only node has 4; waited 15 s"
expect g told 2 times
expect all free
