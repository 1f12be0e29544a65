//! One suite, run against every transport.

mod fixture;
mod killed;
mod message;
mod suite;
mod transports;

#[rustfmt::skip]
macro_rules! conformance {
    ($module:ident, $fixture:ty) => {
        conformance!($module, $fixture, [
            suite::messages_of_every_size_arrive_whole_and_in_order,
            suite::ten_thousand_small_messages_keep_their_order,
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
            killed::a_killed_sender_is_news_and_its_whole_messages_are_not_lost,
            killed::a_killed_receiver_is_news,
        ]);
    };
    ($module:ident, $fixture:ty, [$($from:ident::$test:ident,)*]) => {
        mod $module {
            $(#[test]
            fn $test() {
                crate::$from::$test::<$fixture>();
            })*
        }
    };
}

conformance!(shm, crate::transports::Shm);
conformance!(tcp, crate::transports::Tcp<1>);
conformance!(tcp_striped, crate::transports::Tcp<3>);
