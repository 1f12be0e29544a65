# A node is stopped in order: its groups fail with that cause, it is shown as left, and may come back.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
leave b
within 1s expect node b left
within 1s expect g failed "node b is being stopped"
within 1s expect group g failed "node b is being stopped"
within 1s expect all free
start b
within 1s expect node b alive
launch h from a: 16 x {GPU:1}
within 1s expect h placed
