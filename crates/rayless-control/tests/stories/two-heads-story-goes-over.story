# What has happened under one head is known to the next, and to the one after that: how groups have ended, and why. What ended while there was no head
# is told by the nodes.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
launch one from c: 2 x {GPU:1}
within 2s expect group one running
launch two from c: 12 x {GPU:1}
within 2s expect group two running
kill worker one 0
within 2s expect group one failed "was killed by signal 9"
wait 1s
kill daemon a
wait 500ms
kill worker two 1
within 5s expect head b 2
expect group one failed "was killed by signal 9"
within 2s expect group two failed "was killed by signal 9"
expect event node-joined "node c joined"
expect event head-changed "b is the head now (term 2)"
within 2s expect all free
start a
within 2s expect standby a
wait 1s
kill daemon b
within 5s expect head a 3
expect group one failed "was killed by signal 9"
expect group two failed "was killed by signal 9"
expect event head-changed "b is the head now (term 2)"
