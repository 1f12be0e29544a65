# UDP is blocked, TCP is not: the head takes b for dead, but the driver's sessions with it are well. The head's verdict
# alone ends nothing: 700 GB of weights stay where they are, and b is welcome again in its old life.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
cut udp a b
within 3.6s expect node b dead
wait 60s
expect g placed
expect group g running
heal a b
within 4s expect node b alive
expect life b 1
expect group g running
expect not said "[node-fenced]"
stop g
within 1s expect all free
