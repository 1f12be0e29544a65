# As before, but the client goes away while there is no head. Nobody waits for what was started: the next head ends it as soon as it knows.
store lease 3s
node a: 0 GPU, head
node b: 0 GPU, head, off
within 2s expect head a 1
start b
node c: 8 GPU
node d: 8 GPU
within 2s expect node d alive
delay a d 300ms
launch g from c: 16 x {GPU:1}
wait 350ms
kill daemon a
wait 500ms
cancel g
within 5s expect head b 2
within 2s expect all free
expect group g failed "nobody waited for it any more"
