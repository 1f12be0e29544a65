//! One suite, run against every transport.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, reason = "a test's helpers are tests too")]

mod fixture;
mod killed;
mod message;
mod suite;
mod transports;

/// Every test of the suite for one transport; `$attribute` goes on each.
macro_rules! conformance {
    ($module:ident, $fixture:ty $(, $attribute:meta)?) => {
        mod $module {
            conformance!(@tests $fixture, [$($attribute)?],
                suite::messages_of_every_size_arrive_whole_and_in_order,
                suite::thousands_of_small_messages_keep_their_order,
                suite::every_dtype_and_every_shape_reads_back,
                suite::no_tensor_and_a_thousand_tensors_are_messages_too,
                suite::a_description_crosses_once_and_survives_eviction,
                suite::many_links_at_once_do_not_mix,
                suite::a_header_may_leave_before_its_payload,
                suite::a_full_window_holds_the_sender_and_loses_nothing,
                suite::a_dropped_queue_gives_up_and_both_ends_know,
                suite::a_wait_that_ends_early_leaves_the_link_usable,
                suite::a_send_cancelled_in_the_middle_loses_the_link_at_both_ends,
                suite::a_receive_cancelled_in_the_middle_loses_the_link_at_both_ends,
                suite::a_crossed_step_is_an_error_and_never_a_tensor,
                suite::mistakes_cost_nothing_but_the_call,
                suite::a_link_is_refused_without_its_ticket,
                suite::a_stranger_is_refused_and_the_expected_peer_still_comes_in,
                suite::a_closed_end_says_so,
                suite::a_link_proves_itself_and_a_wrong_one_is_found_out,
                killed::a_killed_sender_is_news_and_its_whole_messages_are_not_lost,
                killed::a_killed_receiver_is_news,
            );
        }
    };
    (@tests $fixture:ty, $attributes:tt, $($from:ident::$test:ident,)*) => {
        $(conformance!(@test $fixture, $attributes, $from::$test);)*
    };
    (@test $fixture:ty, [$($attribute:meta)?], $from:ident::$test:ident) => {
        #[test]
        $(#[$attribute])?
        fn $test() {
            crate::$from::$test::<$fixture>();
        }
    };
}

conformance!(shm, crate::transports::Shm);
conformance!(shm_ring, crate::transports::ShmRing);
conformance!(tcp, crate::transports::Tcp<1>);
conformance!(tcp_striped, crate::transports::Tcp<3>);
conformance!(tls, crate::transports::Tls);
// Run by tests/rdma-vm/conformance, in a guest that has these devices.
conformance!(rxe, crate::transports::Rxe, ignore = "needs soft-RoCE devices: tests/rdma-vm/conformance");
conformance!(siw, crate::transports::Siw, ignore = "needs soft-iWARP devices: tests/rdma-vm/conformance");

/// What one hop over RDMA may cost.
mod rdma_counters {
    use crate::{
        fixture::{Fixture, long},
        message::send_flat,
        transports::{Rxe, Siw},
    };
    use rayless_fabric::transport::Counters;

    fn a_small_hop_is_two_requests_one_doorbell_and_one_completion<F: Fixture>() {
        let (mut tx, mut rx) = F::pair();
        for number in 0..100 {
            let (sender, receiver) = (tx.counters(), rx.counters());
            send_flat(&mut tx, number, 28 << 10, &long()).unwrap();
            rx.recv(Some(number), &long()).unwrap();
            let (sent, received) = (tx.counters(), rx.counters());
            let of_sender = |of: fn(&Counters) -> u64| of(&sent) - of(&sender);
            let of_receiver = |of: fn(&Counters) -> u64| of(&received) - of(&receiver);
            if number < 8 {
                // Within the first window nothing but the hop itself happens at the sender.
                assert_eq!(of_sender(|c| c.work_requests), 2, "hop {number}");
                assert_eq!(of_sender(|c| c.doorbells), 1, "hop {number}");
                assert_eq!(of_sender(|c| c.completions), 0, "hop {number}");
            }
            // The report of a credit is asked for once in 64 hops.
            assert!(of_receiver(|c| c.completions) <= 1 + number / 63, "hop {number}");
            if number % 4 != 3 {
                // With every fourth hop the receiver posts its RECVs again and sends one credit for all four.
                assert_eq!(of_receiver(|c| c.work_requests), 0, "hop {number}");
            }
        }
        let (sent, received) = (tx.counters(), rx.counters());
        println!("100 hops of 28 KiB: sender {sent:?}, receiver {received:?}");
        assert!(sent.work_requests <= 230 && sent.doorbells <= 125 && sent.completions <= 100, "{sent:?}");
        assert!(
            received.work_requests <= 200 && received.doorbells <= 100 && received.completions <= 105,
            "{received:?}"
        );
    }

    #[test]
    #[ignore = "needs soft-RoCE devices: tests/rdma-vm/conformance"]
    fn rxe() {
        a_small_hop_is_two_requests_one_doorbell_and_one_completion::<Rxe>();
    }

    #[test]
    #[ignore = "needs soft-iWARP devices: tests/rdma-vm/conformance"]
    fn siw() {
        a_small_hop_is_two_requests_one_doorbell_and_one_completion::<Siw>();
    }
}
