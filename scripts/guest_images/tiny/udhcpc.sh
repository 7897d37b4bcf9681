#!/bin/sh
# What busybox udhcpc calls when a lease comes, changes or goes. Option 121 overrides the router (RFC 3442).
# `kept` is set where the interface has its address already.
case $1 in
    deconfig) [ -n "$kept" ] || ip -4 address flush dev "$interface" ;;
    bound | renew)
        ip -4 address show dev "$interface" | grep -q "inet $ip/" || {
            ip -4 address flush dev "$interface"
            ip address add "$ip/$mask" broadcast + dev "$interface"
        }
        [ -n "$mtu" ] && ip link set "$interface" mtu "$mtu"
        if [ -n "$staticroutes" ]; then
            set -- $staticroutes
            while [ -n "$2" ]; do
                if [ "$2" = 0.0.0.0 ]; then ip route replace "$1" dev "$interface"
                else ip route replace "$1" via "$2" dev "$interface"; fi
                shift 2
            done
        elif [ -n "$router" ] && ! ip route | grep -q ^default; then
            ip route add default via "${router%% *}" dev "$interface"
        fi
        [ -n "$search$domain" ] && ! grep -qs ^search /etc/resolv.conf && echo "search ${search:-$domain}" >>/etc/resolv.conf
        for server in $dns; do
            grep -qs "nameserver $server\$" /etc/resolv.conf || echo "nameserver $server" >>/etc/resolv.conf
        done
        ;;
esac
