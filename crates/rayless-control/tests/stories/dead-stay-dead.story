# Node b is cut off and declared dead, then the head restarts from its file. b, coming back in its old life, is fenced by the new head too.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch g from c: 16 x {GPU:1}
within 2s expect g placed c:0-7 a:8-15
launch h from b: 8 x {GPU:1}
within 2s expect h placed b:0-7
cut a b
cut c b
within 4s expect node b dead
expect group h failed
expect group g running
restart daemon a
within 2s expect node c alive
heal a b
heal c b
within 3s expect said "[node-fenced] node b"
within 2s expect node b alive
expect keepers b 0
within 1s expect h failed "node b was declared dead"
expect group g running
