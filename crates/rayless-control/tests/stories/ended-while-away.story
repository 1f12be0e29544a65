# A group ends on b while b has no session with the head. The head learns how it ended, not just that it is gone.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch one from b: 4 x {GPU:1}
launch two from b: 4 x {GPU:1}
within 2s expect group one running
within 2s expect group two running
cut udp a b
break b
stop one
kill worker two 2
wait 1s
heal a b
within 2s expect node b alive
within 2s expect group one stopped
within 1s expect group two failed "rank 2 on node b was killed by signal 9"
expect all free
