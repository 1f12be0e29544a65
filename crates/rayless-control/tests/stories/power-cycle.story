# Node b loses power and boots: a new life with nothing on it. What it held is free then, not before.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
power off b
within 3.6s expect node b dead
within 1s expect g failed "node b has been silent"
within 1s expect group g failed
power on b
within 1s expect node b alive
expect life b 2
expect all free
