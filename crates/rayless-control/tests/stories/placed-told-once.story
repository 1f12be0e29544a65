# The session of the driver's node breaks while its group is being placed. The answer reaches the driver after the
# reconnect, and asking again does not make the group look like one that nobody wants.
node a: 8 GPU
node b: 8 GPU
delay a b 200ms
within 5s expect node b alive
wait 1s
launch g from b: 16 x {GPU:1}
wait 415ms
break b
within 5s expect g placed b:0-7 a:8-15
within 5s expect group g running
wait 10s
expect group g running
expect life b 1
