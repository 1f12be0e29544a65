# The session to b breaks while the group is being placed, before b heard of it; b reconnects, and the launch goes on where
# it was: nothing is started twice.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
delay a b 300ms
launch g from a: 24 x {GPU:1}
wait 100ms
break b
within 8s expect g placed a:0-7 b:8-15 c:16-23
within 5s expect group g running
expect life b 1
