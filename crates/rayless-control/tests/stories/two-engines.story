# Two engines on one cluster, each with half GPUs and whole ones; one is killed, the other never notices.
node a: 4 GPU, 32 CPU
node b: 4 GPU, 32 CPU
wait 1s
launch one from a: 4 x {GPU:1, CPU:4} SPREAD
within 2s expect group one running
launch two from b: 8 x {GPU:0.5, CPU:4}
within 2s expect group two running
kill worker one 1
within 1s expect one failed
wait 5s
expect group two running
stop two
within 1s expect all free
