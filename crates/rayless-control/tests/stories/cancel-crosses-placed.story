# The client vanishes while `GroupPlaced` is on the wire to its daemon.
node a: 8 GPU
node b: 8 GPU
wait 1s
delay a b 400ms
launch g from b: 4 x {GPU:1}
wait 1500ms
cancel g
wait 5s
expect all free
expect group g stopped
