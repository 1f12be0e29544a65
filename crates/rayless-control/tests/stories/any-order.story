# Nothing fails because something else has not started yet: node b dials for a minute before there is a
# head, and its driver's launch waits with it. Each says what it waits for.
node a: 8 GPU, off
node b: 8 GPU
wait 60s
expect talk b "waiting for the head at 10.0.0.1:6379"
launch g from b: 16 x {GPU:1}
wait 5s
expect g asking
start a
within 3s expect node b alive
within 1s expect g placed b:0-7 a:8-15
