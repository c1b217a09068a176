//! Tests of the spans of calls, with a subscriber.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use flash_attention::plan::AnyPlan;
use flash_attention::{Arch, Attention, Device, Tensor};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Names and fields of all spans that were entered and left.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    spans: Vec<(&'static str, BTreeMap<&'static str, String>)>,
    entered: usize,
    left: usize,
}

struct Fields(BTreeMap<&'static str, String>);

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl Subscriber for Spans {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut fields = Fields(BTreeMap::new());
        span.record(&mut fields);
        let mut seen = self.0.lock().expect("no panic");
        seen.spans.push((span.metadata().name(), fields.0));
        Id::from_u64(seen.spans.len() as u64)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn event(&self, _event: &Event<'_>) {}
    fn enter(&self, _span: &Id) {
        self.0.lock().expect("no panic").entered += 1;
    }
    fn exit(&self, _span: &Id) {
        self.0.lock().expect("no panic").left += 1;
    }
}

#[test]
fn a_call_is_a_span_with_the_numbers_of_its_plan() {
    for device in [Device::cpu(), Device::emulator(Arch::Sm80)] {
        let q = Tensor::from_slice(&device, [1, 4, 20, 16], &[0.25_f32; 1280]).expect("small");
        let k = Tensor::from_slice(&device, [1, 2, 30, 16], &[0.5_f32; 960]).expect("small");
        let attention = Attention::new().causal();
        let spans = Spans::default();
        let plans = tracing::subscriber::with_default(spans.clone(), || {
            let plan = attention.plan(&q, &k, &k).expect("valid");
            let output = attention.forward(&q, &k, &k).expect("valid");
            let backward = attention.plan_backward(&q, &k, &k, &output, &q).expect("valid");
            attention.backward(&q, &k, &k, &output, &q).expect("valid");
            (plan, backward)
        });
        let plans = [AnyPlan::from(&plans.0), AnyPlan::from(&plans.1)];
        let seen = spans.0.lock().expect("no panic");
        assert_eq!((seen.entered, seen.left), (2, 2));
        let names = ["flash_attention.forward", "flash_attention.backward"];
        assert_eq!(seen.spans.len(), names.len());
        for (((name, fields), expected), plan) in seen.spans.iter().zip(names).zip(plans) {
            assert_eq!(*name, expected);
            let kernels: Vec<_> = plan.entries().iter().map(|entry| entry.name).collect();
            let kernel = if kernels.is_empty() {
                "native".to_owned()
            } else {
                kernels.join(", ")
            };
            let want = [
                ("device", device.to_string()),
                ("kernel", kernel),
                ("dtype", "f32".to_owned()),
                ("q", "[1, 4, 20, 16]".to_owned()),
                ("k", "[1, 2, 30, 16]".to_owned()),
                ("causal", "true".to_owned()),
                ("workspace_bytes", plan.workspace_bytes().to_string()),
                ("bytes_read", plan.cost().bytes_read.to_string()),
                ("bytes_written", plan.cost().bytes_written.to_string()),
                ("flops", plan.cost().flops.to_string()),
            ];
            assert_eq!(*fields, BTreeMap::from(want));
        }
    }
}
