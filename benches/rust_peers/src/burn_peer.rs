//! burn with its Flex backend: its attention, and automatic differentiation of it.

use std::time::{Duration, Instant};

use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::{Failure, Peer, Shape};

pub struct Burn {
    inputs: [Tensor<4>; 3],
    dout: Option<Tensor<4>>,
    causal: bool,
}

impl Burn {
    pub fn new(s: &Shape) -> Result<Self, Failure> {
        let dtype = match s.dtype.as_str() {
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            _ => DType::F32,
        };
        let device = Device::flex();
        let device = if s.backward { device.autodiff() } else { device };
        let draw = |shape: [usize; 4], seed| {
            let data = TensorData::new(Shape::draw(shape.iter().product(), seed), shape);
            Tensor::<4>::from_data(data.convert_dtype(dtype), (&device, dtype))
        };
        let (q, k) = (
            [s.batch, s.heads, s.seqlen_q, s.head_dim],
            [s.batch, s.heads, s.seqlen_k, s.head_dim],
        );
        let inputs = [draw(q, 1), draw(k, 2), draw(k, 3)];
        Ok(Self {
            inputs: if s.backward {
                inputs.map(Tensor::require_grad)
            } else {
                inputs
            },
            dout: s.backward.then(|| draw(q, 4)),
            causal: s.causal,
        })
    }
}

impl Peer for Burn {
    fn run(&mut self) -> Result<Duration, Failure> {
        let [q, k, v] = self.inputs.clone();
        let options = AttentionModuleOptions {
            is_causal: self.causal,
            ..Default::default()
        };
        let start = Instant::now();
        let out = attention(q, k, v, None, None, options);
        if let Some(dout) = &self.dout {
            let _gradients = (out * dout.clone()).sum().backward();
        }
        Ok(start.elapsed())
    }
}
