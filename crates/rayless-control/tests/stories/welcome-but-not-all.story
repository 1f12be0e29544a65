# UDP to b is blocked. Of the two groups on b one has its driver elsewhere and is well; the other was all on b, so nobody could
# vouch for it. When b returns in its old life it is welcome for the first, and ends the second.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch spans from a: 12 x {GPU:1}
within 2s expect group spans running
launch own from b: 2 x {GPU:1}
within 2s expect group own running
cut udp a b
within 4s expect node b dead
expect group own failed "node b is dead"
expect group spans running
heal a b
within 4s expect node b alive
expect life b 1
within 1s expect keepers b 1
expect group own failed
expect group spans running
expect free b: 4 GPU
