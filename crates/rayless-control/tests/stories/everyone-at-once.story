# Head, nodes and drivers all lose power together, and all come back.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from b: 16 x {GPU:1}
within 2s expect group g running
power off a
power off b
wait 10s
power on b
wait 10s
power on a
within 3s expect node b alive
within 1s expect group g failed "came back without its part of the group"
within 1s expect all free
launch h from b: 16 x {GPU:1}
within 1s expect h placed b:0-7 a:8-15
