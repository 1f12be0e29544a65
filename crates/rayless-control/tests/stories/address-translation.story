# A node behind an address translation is refused, and told what to do about it.
node a: 8 GPU
node b: 8 GPU, seen as 172.17.0.2
within 1s expect refused b "calls itself 10.0.0.2 but is seen as 172.17.0.2: an address translation (NAT) lies between"
expect refused b "--network=host"
expect node b unknown
