# The head restarts, and b takes twenty seconds to find it again (its packets are lost). It was the head that was away: nobody
# is declared dead, and nothing is killed. Not even where b takes more than a minute.
node a: 8 GPU
node b: 8 GPU
node c: 8 GPU
wait 1s
launch own from b: 4 x {GPU:1}
within 2s expect group own running
launch other from c: 4 x {GPU:1}
within 2s expect group other running
wait 1s
cut udp a b
cut udp a c
restart daemon a
for 20s expect node b suspect
expect group own running
heal a b
within 6s expect node b alive
wait 40s
expect node c dead
expect group other failed "node c is dead: it did not dial the restarted head within 60 s"
heal a c
within 6s expect node c alive
expect life b 1
expect life c 1
expect group own running
within 1s expect group other running
expect not said "[node-fenced]"
stop own
stop other
within 1s expect all free
