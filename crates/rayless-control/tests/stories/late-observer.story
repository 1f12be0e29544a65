# All cores of the head's host are busy: each of its ticks comes half a second late, for two minutes. No false death; and when
# b really dies, that is noticed all the same.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
late a 500ms
for 120s expect not said "[node-dead]"
expect group g running
power off b
within 15s expect node b dead
within 15s expect g failed "node b has been silent"
