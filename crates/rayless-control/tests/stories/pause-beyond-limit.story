# Node b sleeps for a minute. It is dead, its group failed; on waking it is fenced and kills its workers within a second.
node a: 8 GPU
node b: 8 GPU
wait 1s
launch g from a: 16 x {GPU:1}
within 2s expect group g running
pause b
within 3.6s expect node b dead
within 1s expect g failed "node b has been silent"
wait 56s
expect keepers b 1
resume b
within 1s expect keepers b 0
within 3s expect node b alive
expect life b 2
expect all free
